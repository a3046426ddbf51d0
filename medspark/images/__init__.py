"""Turn files into pixels: DICOM and raster decoding, rendering, de-identification, the phantom."""
