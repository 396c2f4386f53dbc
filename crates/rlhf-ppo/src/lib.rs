//! Proximal policy optimisation with constraints for language models.
