"""What happens between the Trainer's first line and its last step."""
