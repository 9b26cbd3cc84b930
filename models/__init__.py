if __name__ != "pjengine.models":
    raise ImportError("import pjengine.models, not models: a second copy of every class would be loaded")
