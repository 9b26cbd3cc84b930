if __name__ != "pjengine.sharding":
    raise ImportError("import pjengine.sharding, not sharding: a second copy of every class would be loaded")
