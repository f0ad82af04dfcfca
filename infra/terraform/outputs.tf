output "bucket" {
  value = aws_s3_bucket.store.bucket
}

output "database_address" {
  value = aws_db_instance.this.address
}

output "database_secret" {
  description = "Where the password is: aws secretsmanager get-secret-value --secret-id …"
  value       = aws_db_instance.this.master_user_secret[0].secret_arn
}

output "role" {
  value = aws_iam_role.pods.arn
}
