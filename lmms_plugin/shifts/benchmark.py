"""The fifteen corruptions of ImageNet-C, whose mean at five severities is the mPC of Michaelis et al."""

FIFTEEN = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""Names of the corruptions of Hendrycks & Dietterich (ICLR 2019) without the four extra ones (arXiv 1907.07484)."""
