"""What can be wrong with a bundle.

BundleError
├── LayoutError     a name, a version or a folder is not what the layout asks for
├── ManifestError   manifest.json is missing, damaged or of another format
├── IntegrityError  a file is missing, or is not the one that was exported
├── GraphError      a model file asks for what is not loaded
└── SignatureError  a bundle is not signed by whom it must be, or a key is none
"""


class BundleError(Exception):
    """Anything wrong with a bundle; the message says where and what to do."""


class LayoutError(BundleError):
    """A name, a version or a folder is not what the layout asks for."""


class ManifestError(BundleError):
    """`manifest.json` is missing, damaged or of another format."""


class IntegrityError(BundleError):
    """A file of the bundle is missing, or is not the one that was exported."""


class GraphError(BundleError):
    """A model file is none, or asks for what is not loaded."""


class SignatureError(BundleError):
    """A bundle is not signed by whom it must be, or a key cannot be used."""
