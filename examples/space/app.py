"""The studio as a Hugging Face Space: what `targetclip studio` serves, on the port of the Space."""

import os

from predictor.cli import main

if __name__ == "__main__":
    port = os.environ.get("GRADIO_SERVER_PORT", "7860")
    main(["studio", "--host", "0.0.0.0", "--port", port, "--no-browser"])
