//! The `fathom` binary: one module per subcommand.

fn main() {}
