"""Messages in other languages than English: which language, the messages, and their translations."""
