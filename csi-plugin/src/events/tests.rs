//! Stories on a clock that the test moves.
