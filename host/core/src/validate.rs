//! The one gate through which a foreign graph passes.
