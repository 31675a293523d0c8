"""One step of a task: where its files lie, how it is built, resumed, fitted and tested."""
