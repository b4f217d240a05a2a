"""The sub-commands of `eagle`, one module each. torch and transformers are imported inside them, so that help is quick."""
