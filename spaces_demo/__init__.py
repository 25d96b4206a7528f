"""The Gradio demo of SPARROW. Installed as the import package `sparrow_space`; as a Space, `app.py` starts it."""
