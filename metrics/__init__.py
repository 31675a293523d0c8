"""From predictions to scores; nothing in here draws."""
