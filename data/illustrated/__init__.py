"""Pictures by outside illustrators: avatars, their captions, and codes that stand for them."""
