"""One rule per ATen call; importing this package fills the table."""
