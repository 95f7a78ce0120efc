"""Result -> text: one module per format."""
