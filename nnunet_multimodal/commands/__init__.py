"""One module per command of ``nnunet_multimodal``; none imports torch or nnunetv2 before it runs."""
