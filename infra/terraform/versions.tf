terraform {
  required_version = ">= 1.9"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 6.0"
    }
  }

  # Where the state lies when more than one person applies this: a bucket of its own, not the one below.
  # backend "s3" {
  #   bucket       = "example-terraform-state"
  #   key          = "deleatur/terraform.tfstate"
  #   region       = "eu-central-1"
  #   use_lockfile = true
  # }
}

provider "aws" {
  region = var.region
  default_tags {
    tags = { project = var.name }
  }
}
