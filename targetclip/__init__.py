"""targetclip"""
