"""What a bundle is: spec, cuts, names, contract, manifest, files, errors. Standard library only, outside ``ir/``."""
