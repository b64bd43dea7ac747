"""What is learned: a task turns a row into an example. Rows are read and checked here. No torch."""
