"""What a conversion does: tables of cost and changes, pictures. Imports rewriting and below; not passes or demo."""
