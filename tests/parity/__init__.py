"""Agreement with golden files: tensors that the published implementations gave for tiny random models.

``python -m tests.parity FILE|FOLDER...`` compares everything a file holds and says so line by line. The files are
safetensors with one JSON header; :mod:`tests.parity.golden` reads them. To cover another case, write in the family's
module a function that takes a :class:`~tests.parity.golden.Golden` and yields
:class:`~tests.parity.golden.Check` objects (``golden.check(name, value)`` makes one), run everything in fp32 and in
fp64, and add it to the module's ``RUNNERS`` under the case's prefix. A new module is added to
:data:`tests.parity.runner.FAMILIES`. Whatever a file holds besides weights (``w.``), inputs (``in.``) and
intermediates (``mid``) and no check mentions is reported as a failure, so that nothing is passed over in silence.
"""
