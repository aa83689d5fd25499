"""The clock of virtual devices: how long operations, copies and training steps take, without running or sleeping."""
