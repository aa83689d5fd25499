"""Output for users: tables on standard error, and files in a folder."""
