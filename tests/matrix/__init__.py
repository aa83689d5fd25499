"""The matrix of docs/matrix.md: trainers of many versions, each unmodified and in an environment of its own."""
