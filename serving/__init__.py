if __name__ != "pjengine.serving":
    raise ImportError("import pjengine.serving, not serving: a second copy of every class would be loaded")
