"""One process becomes several, and how they end: relaunch, launcher, records of failed ranks."""
