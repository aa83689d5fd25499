"""What activations and temporaries a model really needs: its own forward and backward pass, run on shapes alone."""
