"""A denoiser before a trained classifier and a contrastive detector, trained together."""
