"""The bundled world's networks: the jobs that train them."""
