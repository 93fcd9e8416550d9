"""Training and test data, one module a task; a module reads rows and turns them into token ids and labels."""
