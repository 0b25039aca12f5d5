"""How the bundled model `scenes` was made: its pictures, its training, and the measurement of its quality."""
