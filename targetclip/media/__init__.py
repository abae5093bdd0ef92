"""Pictures and clips: reading and writing them, and faces in them."""
