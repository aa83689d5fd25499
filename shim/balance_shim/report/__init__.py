"""What people see: tables for standard error, files for a folder."""
