"""No method: people are in the picture by reference guidance alone, on any checkpoint, without a file.

Also beside what brings a face in by other means: a LoRA of a person, IP-Adapter units of other extensions.
"""

from lib_portrait.checkpoints.files import AdapterFiles
from lib_portrait.methods.declarations import Declaration

DECLARATION = Declaration(files=AdapterFiles(method="none", title="Reference guidance only"))
