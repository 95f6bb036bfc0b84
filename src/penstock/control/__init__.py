"""What an operator may see and do; the one thing that command line, HTTP and UI call."""
