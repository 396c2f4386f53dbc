//! Direct preference optimisation.
