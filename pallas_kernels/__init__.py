if __name__ != "pjengine.pallas_kernels":
    raise ImportError(
        "import pjengine.pallas_kernels, not pallas_kernels: a second copy of every class would be loaded"
    )
