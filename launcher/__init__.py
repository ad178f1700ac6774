"""The command line `baton`, and Ray actors on one machine or many."""
