"""The deduplicated store: containers, journals, pointer maps, catalog and synthesis.

Leaf package: synchronous, knows no trio and no pyfuse3. FORMAT.md beside this file is the specification.
"""
