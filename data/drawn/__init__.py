"""The bundled world's pictures: drawn faces, their captions and what they show."""
