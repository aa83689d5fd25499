"""One process becomes several, and how they end: relaunch, launcher, what failed ranks leave behind."""
