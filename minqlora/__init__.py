"""QLoRA from scratch. Read the modules in the order of the README; these are the names that others call."""
