"""Changes to a training, from the call of `Trainer.train` to the last step."""
