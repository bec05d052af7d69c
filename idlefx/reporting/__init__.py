"""What a conversion does, told: tables of cost, pictures of tokens. Imports rewriting and below; not passes or demo."""
