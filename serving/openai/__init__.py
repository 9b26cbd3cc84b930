if __name__ != "pjengine.serving.openai":
    raise ImportError("import pjengine.serving.openai, not serving.openai: a second copy would be loaded")
