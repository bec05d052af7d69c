"""Two models and scenes for them: small ones that are drawn, real ones that are fetched. Imports capture and below."""
