"""Networks: timm backbones behind a normalisation layer, model files and predictors."""
