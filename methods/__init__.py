"""The science: methods, their loss terms, and the objective that puts the terms together."""
