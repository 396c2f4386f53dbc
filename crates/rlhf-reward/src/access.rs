//! What all trainers of scorers have.

/// The accessors and checkpoint files of a trainer with the fields `model`, `updater`, `config`.
macro_rules! trainer_access {
    ($trainer:ident, $config:ident) => {
        impl<S: rlhf_core::Scorer> $trainer<S> {
            /// The model in training.
            pub fn model(&self) -> &S {
                &self.model
            }

            /// The model, trained.
            pub fn into_model(self) -> S {
                self.model
            }

            /// The options this trainer was made with.
            pub fn config(&self) -> &$config {
                &self.config
            }

            /// The update path: its learning rate, loss scale and averaged weights.
            pub fn updater(&self) -> &rlhf_scale::Updater {
                &self.updater
            }

            /// Writes weights, optimiser state and step into the folder `dir`.
            ///
            /// # Errors
            /// If a file cannot be written.
            pub fn save(&self, dir: &std::path::Path) -> $crate::Result<()> {
                Ok(self.updater.save(dir)?)
            }

            /// Restores bit for bit what [`save`](Self::save) wrote.
            ///
            /// # Errors
            /// A missing or damaged file; a file of another model or configuration. Nothing has
            /// changed then.
            pub fn load(&mut self, dir: &std::path::Path) -> $crate::Result<()> {
                Ok(self.updater.load(dir)?)
            }
        }
    };
}

pub(crate) use trainer_access;
