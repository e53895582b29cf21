"""A page in the browser for models: captions, answers, translations and pictures, and where the model looked.

Every module here but `steering` needs Gradio (extra `ui`); whoever opens the page asks for it first.
"""
